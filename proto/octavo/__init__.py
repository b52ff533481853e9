"""Wire contract of Octavo, one package per version."""
