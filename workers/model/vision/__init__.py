"""Vision encoders, and how their pictures stand in a prompt."""
