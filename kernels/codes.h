// The codes of a tile of 16 rows x 128 columns, as kernels/layout.py stores them for a CPU: planes one after the other,
// each of lines of 64 bytes, 4 for each row. Bytes are fields of four neighbouring columns for each field in a byte.

// A field of WIDTH bits, the one at bit FROM of each byte, moved to bit TO.
template <int WIDTH, int FROM, int TO> LQ_INLINE Ints field(Ints line) {
  Ints moved = line;
  if constexpr (FROM > TO) moved = right16<FROM - TO>(line);
  if constexpr (FROM < TO) moved = left16<TO - FROM>(line);
  return WIDTH == 8 ? moved : both(moved, bytes(((1 << WIDTH) - 1) << TO));
}

template <int WIDTH, int LOW, int F> LQ_INLINE void fields(Ints line, Ints* codes) {
  const Ints found = field<WIDTH, WIDTH * F, LOW>(line);
  codes[F] = LOW ? either(codes[F], found) : found;
  if constexpr (WIDTH * (F + 1) < 8) fields<WIDTH, LOW, F + 1>(line, codes);
}

// The planes from bit LOW on of BITS bits that are left, widest first.
template <int BITS, int LOW> LQ_INLINE void planes(const uint8_t* tile, int c, Ints* codes) {
  constexpr int WIDTH = BITS >= 8 ? 8 : BITS >= 4 ? 4 : BITS >= 2 ? 2 : 1;
#pragma GCC unroll 8
  for (int line = 0; line < WIDTH; line++)
    fields<WIDTH, LOW, 0>(ints(tile + 256 * LOW + 64 * (WIDTH * c + line)), codes + line * (8 / WIDTH));
  if constexpr (BITS > WIDTH) planes<BITS - WIDTH, LOW + WIDTH>(tile, c, codes);
}

// codes[i], for each row: those of columns 32 c + 4 i .. 32 c + 4 i + 3, a byte each.
template <int BITS> LQ_INLINE void codes_of(const uint8_t* tile, int c, Ints* codes) { planes<BITS, 0>(tile, c, codes); }

// What affine codes stand for, not yet rounded.
LQ_INLINE Floats affine(Floats codes, Floats zero, Floats scale) { return mul(sub(codes, zero), scale); }
