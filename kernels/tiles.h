// The tiles of a CPU that has them.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// This thread's tiles, as another library may have set them up, are put back at the end.
class Tiles {
 public:
  explicit Tiles(const TileConfig& config) {
    _tile_storeconfig(&before_);
    _tile_loadconfig(&config);
  }
  ~Tiles() {
    if (before_.palette) {
      _tile_loadconfig(&before_);
    } else {
      _tile_release();
    }
  }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;

 private:
  TileConfig before_;
};
