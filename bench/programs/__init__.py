"""What runs in the processes of a bench. Each module has roles that `driver.run` is given by name."""
