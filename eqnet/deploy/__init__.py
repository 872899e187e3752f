"""What runs on a device: export, integer reference, runtimes, certificate."""
