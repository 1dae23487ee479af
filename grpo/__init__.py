"""Group-relative policy optimisation: advantages, losses, the batch, the learner, the loop and its report."""
