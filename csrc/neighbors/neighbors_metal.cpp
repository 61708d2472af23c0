#include <stdexcept>

#include "neighbors/neighbors.h"

namespace bulwark {
void Knn::metal(const Arrays&, Arrays&) { throw std::runtime_error("[bulwark] knn has no Metal kernel"); }
}  // namespace bulwark
