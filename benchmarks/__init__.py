"""What vlmq does per second, per megabyte and per millisecond, beside what it is compared with."""
