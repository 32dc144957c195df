"""What two threads that take turns tell each other."""
