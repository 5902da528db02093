"""Several ranks, and the DTensors of one."""
