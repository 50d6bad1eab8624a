"""The QEMU postcopy migration protocol: both ends of the wire, on the real kernel."""
