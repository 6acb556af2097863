// kWidth neighbouring elements that travel together, in accesses of at most 16 bytes.
#pragma once
#include "device.cuh"

template <typename Element, int kWidth>
struct Vector {
    static constexpr int kLimit = 16 / sizeof(Element);
    static constexpr int kPerAccess = kWidth < kLimit ? kWidth : kLimit;
    static_assert(kWidth % kPerAccess == 0, "a vector is a whole number of accesses");

    struct alignas(kPerAccess * sizeof(Element)) Access {
        Element lane[kPerAccess];
    };

    Access access[kWidth / kPerAccess];

    __device__ __forceinline__ Element& operator[](int lane) {
        return access[lane / kPerAccess].lane[lane % kPerAccess];
    }

    __device__ __forceinline__ Element operator[](int lane) const {
        return access[lane / kPerAccess].lane[lane % kPerAccess];
    }
};

// The address must be a multiple of min(16, kWidth * sizeof(Element)) bytes.
template <int kWidth, typename Element>
__device__ __forceinline__ Vector<Element, kWidth> load_vector(const Element* address) {
    using Packed = Vector<Element, kWidth>;
    const auto* from = reinterpret_cast<const typename Packed::Access*>(address);
    Packed vector;
#pragma unroll
    for (int i = 0; i < kWidth / Packed::kPerAccess; ++i) vector.access[i] = from[i];
    return vector;
}

// Likewise.
template <typename Element, int kWidth>
__device__ __forceinline__ void store_vector(Element* address, const Vector<Element, kWidth>& vector) {
    using Packed = Vector<Element, kWidth>;
    auto* to = reinterpret_cast<typename Packed::Access*>(address);
#pragma unroll
    for (int i = 0; i < kWidth / Packed::kPerAccess; ++i) {
        if constexpr (Packed::kPerAccess > 1) {
            unsigned int words[sizeof(to[i]) / 4];
            memcpy(words, &vector.access[i], sizeof words);
            store_words(to + i, words);
        } else {
            to[i] = vector.access[i];
        }
    }
}
