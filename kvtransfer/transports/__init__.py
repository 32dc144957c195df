"""Ways for one worker to read the KV pool of another by itself."""
