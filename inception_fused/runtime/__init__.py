"""How a launch is made: submitted, recorded, repeated, interpreted or done by ATen; what the machine has."""
