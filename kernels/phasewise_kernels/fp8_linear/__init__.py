"""Products with a weight kept in fp8."""
