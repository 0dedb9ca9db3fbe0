"""`python -m radlads.flows.cli`."""

from radlads.flows.cli import main

main()
