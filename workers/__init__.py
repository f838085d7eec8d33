"""The programs that do the work: consumers, engines, the reaper and the node that starts them."""
