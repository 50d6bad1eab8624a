"""The only sockets, threads and clocks: transports, the two event loops, guest processes."""
