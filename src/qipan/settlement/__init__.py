"""From raw meters to money: metering, rating, contracts, service levels, imbalance, disputes, settlement runs; pure."""
