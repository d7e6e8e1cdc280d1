"""Watches a training run: writer and reader of its folder, alerts, the terminal view, plots, an HTML page.

What a run's folder holds is described in `srde.monitor.log` (how its files are written) and `srde.monitor.run` (what is
read from them). Nothing here loads torch.
"""
