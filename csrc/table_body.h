// The row of function pointers of one instruction set. Included last, inside its anonymous namespace.

constexpr Kernels make_table(const char* name) {
  return {.name = name,
          .lanes = Vec::W,
          .panel = kPanel,
          .tile = kTile,
          .word_unit = 1,
          .packed_words = 96 << 10,       // 384 KiB
          .interleaved_words = 24 << 10,
          .blur_rows = kBlurRows,
          .pairs = Vec::kHasPairs,
          .interleaves_packing = kInterleavesPacking,
          .floats = nullptr,
          .pack = pack,
          .pack_left = pack,
          .pack_rows = pack_rows,
          .multiply = multiply<Layout::kPacked>,
          .multiply_columns = multiply<Layout::kColumns>,
          .multiply_rows = multiply<Layout::kRows>,
          .write_tile = write_tile,
          .round_tile = round_tile,
          .fence = Vec::fence,
          .fold = fold,
          .reduce_lanes = reduce_lanes,
          .combine = combine,
          .gradient = gradient,
          .blur = blur,
          .load_strip = load_strip,
          .store_row = store_row,
          .peak = peak};
}
