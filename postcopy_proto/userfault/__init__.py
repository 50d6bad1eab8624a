"""The Linux side: guest memory, the userfaultfd that reports its faults, the backend over both."""
