"""What a pickle of tensors may be: the checks that float checkpoints go through too."""

from ddim.pickles import Unfit, check_tensors, check_unread, foreign

__all__ = ["Unfit", "check_tensors", "check_unread", "foreign"]
