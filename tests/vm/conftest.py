"""What is in `guest` needs the virtual machine: `make test-vm` runs it there, and `make test` leaves it alone."""

collect_ignore = ["guest"]
