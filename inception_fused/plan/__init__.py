"""Which tile and which implementation a launch takes; what that should cost. No launches."""
