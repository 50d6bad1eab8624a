"""The Linux side: guest memory, the userfaultfd that reports its faults, the backend that fills it."""
