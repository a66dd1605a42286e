"""A virtual machine that runs the product: Debian 12, systemd, SELinux enforcing."""
