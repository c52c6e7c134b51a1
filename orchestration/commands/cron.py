"""`md4 cron`: jobs at their times."""
