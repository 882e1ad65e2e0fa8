"""What a step asks of the device it runs on: arithmetic, compilation, numbers on their way to the host, time."""
