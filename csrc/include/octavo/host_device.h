// Marks what CUDA kernels share with the host.

#ifndef OCTAVO_HOST_DEVICE_H_
#define OCTAVO_HOST_DEVICE_H_

#ifdef __CUDACC__
#define OCTAVO_HOST_DEVICE __host__ __device__
#else
#define OCTAVO_HOST_DEVICE
#endif

#endif  // OCTAVO_HOST_DEVICE_H_
