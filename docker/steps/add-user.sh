#!/bin/sh
# Adds the user that the images run as, and its folders, to the system under $OCTAVO_ROOT ("" = this one).
set -eu
root=${OCTAVO_ROOT:-}
id=10001
echo "octavo:x:$id:" >> "$root/etc/group"
echo "octavo:x:$id:$id:Octavo:/nonexistent:/usr/sbin/nologin" >> "$root/etc/passwd"
install -d "$root/etc/octavo"
# Snapshots, and a Unix socket: the folders where volumes go. Everything else may be read-only.
install -d -o "$id" -g "$id" -m 0700 "$root/var/lib/octavo"
install -d -o "$id" -g "$id" -m 0755 "$root/run/octavo"
