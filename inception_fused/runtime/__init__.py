"""How a launch is made: submitted, recorded, replayed, interpreted, by the extension or by ATen; what is installed."""
