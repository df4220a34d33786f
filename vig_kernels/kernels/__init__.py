"""The backends: a package each, which says where it runs (`why_not(device)`), with one module an op.

What a backend's modules offer is the same for all (the values are those of vig_kernels/problem.py):

    linear_nll.forward(problem, stats) -> (nll, {stat: (N,) tensor})
        stats: of "lse", "lse_lo", "entropy", "argmax"
    linear_nll.backward(upstream, saved, problem, needs) -> (grad_hidden, grad_weight, grad_bias)
    linear_vig.with_stats(problem, hidden_null, stats) -> (vig, nll_image, nll_null, {stat: (N,) tensor})
        stats: of vig_kernels.ops.linear_vig.STATS
    linear_cross_entropy.forward_backward(problem, row_weight, z_loss, needs[, budget][, values])
        -> (loss_sum, grad_hidden, grad_weight, grad_bias), the gradients of loss_sum, None where not needed
    gaussian_blur.forward(images, gaussian, out) -> out

`problem` has N >= 1 rows. Values are float32, "argmax" int64. Ignored rows give 0.0, and -1 for "argmax".
"lse_lo" is what rounding lse to float32 loses. nll is formed as (max - z[target]) + log sum_v exp(z_v - max), and p is
rounded to float32 before 1 is subtracted: a row that is certain has a gradient of exactly 0.

linear_vig gives the bits of linear_nll for each pass, and vig = nll_null - nll_image, 0 where both are infinite. It
may leave "kl" out: the torch backend then forms it.

`values` are (N,) tensors to fill, of "nll", "lse", "entropy", "argmax"; rows that are ignored keep what stands in them.
They are given only if some are asked for, and never to a backend whose row of vig_kernels/backend_table.py says
`fills_values=False`. Gradients are float32; a row with `bfloat16_gradients=True` says that those of bfloat16 hidden
states and weights are bfloat16.

A row with `keeps_block=True` says that linear_cross_entropy has `kept_rows(problem, needs, budget)`: forward_backward
then takes a budget in bytes and (scale, reciprocal), which the loss is multiplied by, before the values. It may return
a block of `kept_rows` rows, `padded(V)` wide, their factors and the order of the rows behind the bias gradient instead
of those of hidden and weight, which `block_gradients` forms of the three.
"""
