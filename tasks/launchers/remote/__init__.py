"""Launchers whose jobs run on other machines: `hosts` over ssh, `slurm` by batch jobs."""
