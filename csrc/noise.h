// Noise beside the elements it belongs to: how an op walks over [rows, event] in memory order while normals are drawn in
// logical order.
#pragma once
#include "random.h"

FASTGEN_BEGIN

// Elements offset + k * stride + [0, count) for k < runs, of one sample, and their noise back to back.
struct Strip {
  int64_t row, part, offset, runs, count, stride;
  const float* noise;
};

// Normals of channels [channel, channel + channels) x pixels [pixel, pixel + count) of a sample of `pixels` pixels a channel,
// in channels-last order. Drawn by runs of one channel, or of all at once where the block holds whole channels.
template <class Math>
inline void draw_pixels(const Keys& keys, int64_t sample, int64_t pixels, int64_t pixel, int64_t count, int64_t channel,
                        int64_t channels, float* out) {
  TileNoise drawn;
  const int64_t together = count == pixels ? channels : 1;
  for (int64_t c = 0; c < channels; c += together) {
    const int64_t begin = (channel + c) * pixels + pixel, shift = begin % 4;
    draw_row<Normal, Math>(keys, sample, begin - shift, shift + together * count, drawn.values);
    for (int64_t k = 0; k < together; ++k) {
      const float* from = drawn.values + shift + k * count;
      for (int64_t p = 0; p < count; ++p) out[p * channels + c + k] = from[p];
    }
  }
}

// How [rows, event] is cut into strips: `channels` is 0 for contiguous samples, else samples are channels-last images.
struct Strips {
  Tiling tiling;
  int64_t channels, pixels = 0, pixel_block = 0, channel_block = 0, pixel_blocks = 0;
  int64_t parts;  // strips of one row

  Strips(int64_t rows, int64_t event, int64_t channels_) : tiling(rows, event), channels(channels_), parts(tiling.parts) {
    if (!channels) return;
    pixels = event / channels;
    // whole vectors of pixels first, then as many channels as a tile has room for
    pixel_block = max(1, min(pixels, max(64, TILE / min(channels, 32) / 64 * 64)));
    channel_block = min(channels, max(1, TILE / pixel_block));
    pixel_blocks = ceil_div(pixels, pixel_block);
    parts = pixel_blocks * ceil_div(channels, channel_block);
  }

  // body(strip) for all strips, each with its noise: `given` in memory order, or drawn at the keys. `merge`: short
  // contiguous rows may come as one strip under the number of the first. `ahead`: the memory that bodies will take, from its
  // first element on.
  template <class Body>
  void run(const Keys& keys, const float* given, bool fast, bool merge, const Ahead& ahead, int64_t threads,
           Body&& body) const {
    if (channels) {
      const int64_t total = tiling.rows * parts, batch = 4;
      parallel_for(ceil_div(total, batch), tiling.rows * tiling.event < SERIAL ? 1 : threads, [&](int64_t task) {
        for (int64_t i = task * batch; i < min(total, (task + 1) * batch); ++i) {
          TileNoise noise;
          const int64_t row = i / parts, part = i % parts;
          const int64_t pixel = part % pixel_blocks * pixel_block, channel = part / pixel_blocks * channel_block;
          const int64_t count = min(pixel_block, pixels - pixel), width = min(channel_block, channels - channel);
          if (fast) draw_pixels<Fast>(keys, row, pixels, pixel, count, channel, width, noise.values);
          else draw_pixels<Exact>(keys, row, pixels, pixel, count, channel, width, noise.values);
          const int64_t offset = row * tiling.event + pixel * channels + channel;
          if (width == channels) body(Strip{row, part, offset, 1, count * width, 0, noise.values});
          else body(Strip{row, part, offset, count, width, channels, noise.values});
        }
      });
      return;
    }
    tiling.run(threads, [&](const Tile& tile) {
      TileNoise drawn;
      const int64_t offset = tile.row * tiling.event + tile.begin;
      const float* noise = given ? given + offset : drawn.values;
      if (!given) draw_tile<Normal>(keys, tile, fast, drawn.values, ahead.from(offset));
      if (merge) return body(Strip{tile.row, tile.part, offset, 1, tile.rows * tile.count, 0, noise});
      for (int64_t r = 0; r < tile.rows; ++r) {
        const int64_t skip = r * tile.count;  // rows are whole where there are several
        body(Strip{tile.row + r, tile.part, offset + skip, 1, tile.count, 0, noise + skip});
      }
    });
  }
};

FASTGEN_END
