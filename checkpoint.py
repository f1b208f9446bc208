"""Every model file read or written."""
