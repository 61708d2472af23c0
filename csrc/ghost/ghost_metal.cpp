// Host side of ghost.metal.
#include <stdexcept>

#include "ghost/ghost.h"

namespace bulwark {
static void none() { throw std::runtime_error("[bulwark] the family ghost has no Metal kernel"); }

void GhostSqNorms::metal(const Arrays&, Arrays&) { none(); }
void GhostGrads::metal(const Arrays&, Arrays&) { none(); }
void GhostClippedSum::metal(const Arrays&, Arrays&) { none(); }
void EmbeddingSqNorms::metal(const Arrays&, Arrays&) { none(); }
void EmbeddingClippedSum::metal(const Arrays&, Arrays&) { none(); }
void EmbeddingLinearProducts::metal(const Arrays&, Arrays&) { none(); }
}  // namespace bulwark
