// The row of function pointers of one instruction set. Included last, inside its anonymous namespace.

constexpr Kernels make_table(const char* name) {
  return {name,
          Vec::W,
          kPanel,
          kTile,
          kBlurRows,
          Vec::kHasPairs,
          kPacksBeside,
          pack,
          pack_rows,
          multiply<Layout::kPacked>,
          multiply<Layout::kColumns>,
          multiply<Layout::kRows>,
          write_tile,
          round_tile,
          Vec::fence,
          fold,
          reduce_lanes,
          combine,
          gradient,
          blur,
          load_strip,
          store_row,
          peak};
}
