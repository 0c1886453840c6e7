"""The numbers of the README, measured: `make bench`. Ratios are taken in one run, against what one would write without this."""
