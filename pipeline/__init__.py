"""virt-rt: one CPU plan and one set of recipes in, a proven RT-virtualization release out."""
