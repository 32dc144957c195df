"""How KV is made smaller on its way: lossy, page by page."""
