"""Either kind of policy: what the learner trains, the torch engine samples from and checkpoints hold."""

from __future__ import annotations

from policy.deepseek import DeepseekPolicy
from policy.dense import DensePolicy

Policy = DeepseekPolicy | DensePolicy
