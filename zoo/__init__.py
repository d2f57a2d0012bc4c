"""Everything that knows a particular architecture, checkpoint format or data set."""
