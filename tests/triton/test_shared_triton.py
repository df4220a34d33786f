"""The tests that every backend takes, on the Triton kernels in the interpreter; conftest.py leaves the rest out.

Values are in test_kernels_triton.py. Gradients are here: at most twice the error of eager PyTorch.
"""

from test_linear_cross_entropy import (  # noqa: F401
    test_a_divisor_of_zero_gives_zero_even_of_infinity,
    test_backward_twice_gives_twice_the_gradient,
    test_differentiating_twice_raises,
    test_divisors,
    test_no_reduction_takes_any_upstream,
    test_nothing_to_learn,
    test_rows_of_weight_zero_may_hold_anything,
    test_small_float16_gradients_survive_loss_scaling,
    test_targets_and_weights_of_any_stride_and_any_weight_of_ignored_rows,
    test_weighted_loss_and_gradients,
)
from test_linear_nll import (  # noqa: F401
    test_a_row_does_not_depend_on_the_others,
    test_gradients_with_random_upstream,
    test_huge_logits_have_finite_gradients,
    test_ignored_rows_may_hold_anything,
    test_logits_as_large_as_float32_holds,
    test_minus_infinity_masks_words,
    test_nan_is_shown_and_stays_in_its_row,
    test_nll_is_no_difference_of_large_numbers,
    test_nothing_to_learn_gives_zero_gradients,
    test_only_what_needs_a_gradient_gets_one,
    test_runs_repeat_bit_by_bit,
    test_shapes_and_integer_targets,
    test_the_lowest_finite_logit_beats_minus_infinity,
)
from test_linear_vig import test_shape_and_no_gradient  # noqa: F401
from test_stats_fuzz import test_statistics_of_drawn_losses, test_statistics_of_drawn_pairs  # noqa: F401
from test_vig_stats import (  # noqa: F401
    test_equal_passes_have_no_divergence,
    test_some_of_them_are_the_same,
    test_words_that_the_bias_rules_out_add_nothing,
)
from test_vig_stats import test_values as test_values_beside_vig  # noqa: F401
