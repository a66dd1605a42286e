"""`python -m srpc_client.cli` is `srpc`."""

from srpc_client.cli import main

main()
