"""What a worker does with the device under it: SM shares, memory that outlives a process, telemetry."""
