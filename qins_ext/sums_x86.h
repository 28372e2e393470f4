/* Included by instruction sets with 256-bit registers, after WORD. */

/* The sums of four registers' lanes, in the order of vf_sum */
WORD void sum4_halves(const __m256 *half, float *sums)
{
    __m256 quarter[2];
    for (int i = 0; i < 2; i++) { /* rows 0 and 1, rows 2 and 3 */
        quarter[i] = _mm256_add_ps(_mm256_permute2f128_ps(half[2 * i], half[2 * i + 1], 0x20),
                                   _mm256_permute2f128_ps(half[2 * i], half[2 * i + 1], 0x31));
    }
    /* rows 0, 0, 2, 2, and 1, 1, 3, 3 */
    const __m256 eighth =
        _mm256_add_ps(_mm256_shuffle_ps(quarter[0], quarter[1], 0x44), _mm256_shuffle_ps(quarter[0], quarter[1], 0xee));
    const __m256 sum = _mm256_add_ps(_mm256_permute_ps(eighth, 0x88), _mm256_permute_ps(eighth, 0xdd));
    const __m128 low = _mm256_castps256_ps128(sum), high = _mm256_extractf128_ps(sum, 1);
    _mm_storeu_ps(sums, _mm_unpacklo_ps(low, high));
}
