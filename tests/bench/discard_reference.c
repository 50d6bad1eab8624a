/*
 * What a source in C does at the switchover, to compare the vectorised encoder with.
 *
 * The algorithm: find the next dirty page, find the next clean page behind it, queue the run as
 * byte start and byte length, ship a command when twelve are queued and once more at the end.
 * Bits are scanned a word at a time with count-trailing-zeros.
 *
 * Two variants that differ in how a shipped command reaches the stream's buffer:
 *   bytewise  each byte is put by itself into the buffer, whose end is checked each time
 *   swapped   the ranges are stored byte-swapped into a small buffer, and that is copied
 *
 * The stream's buffer is one piece of memory that is used again when it is full, as if it had been
 * sent; the return value is the number of bytes that went through it. With a buffer that is large
 * enough the output can be compared.
 */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { RANGES_PER_COMMAND = 12, ENVELOPE = 5, LONGEST_PREFIX = 3 + 255 };

struct stream {
    uint8_t *buffer;
    size_t size;
    size_t used;
    size_t sent;
};

struct queue {
    const uint8_t *prefix; /* version, name length, name, NUL */
    size_t prefix_size;
    uint64_t start[RANGES_PER_COMMAND];
    uint64_t length[RANGES_PER_COMMAND];
    unsigned count;
};

static void send_all(struct stream *s)
{
    s->sent += s->used;
    s->used = 0;
}

static void put_byte(struct stream *s, uint8_t value)
{
    if (s->used == s->size) {
        send_all(s);
    }
    s->buffer[s->used++] = value;
}

static void put_be64(struct stream *s, uint64_t value)
{
    for (int shift = 56; shift >= 0; shift -= 8) {
        put_byte(s, value >> shift);
    }
}

static void put_bytes(struct stream *s, const uint8_t *bytes, size_t count)
{
    if (count > s->size - s->used) {
        send_all(s);
    }
    memcpy(s->buffer + s->used, bytes, count);
    s->used += count;
}

static void put_envelope(struct stream *s, size_t payload)
{
    const uint8_t envelope[ENVELOPE] = { 0x08, 0x00, 0x06, payload >> 8, payload };

    put_bytes(s, envelope, sizeof(envelope));
}

static void ship_bytewise(struct stream *s, struct queue *q)
{
    put_envelope(s, q->prefix_size + 16 * q->count);
    for (size_t i = 0; i < q->prefix_size; i++) {
        put_byte(s, q->prefix[i]);
    }
    for (unsigned i = 0; i < q->count; i++) {
        put_be64(s, q->start[i]);
        put_be64(s, q->length[i]);
    }
    q->count = 0;
}

static void ship_swapped(struct stream *s, struct queue *q)
{
    uint8_t payload[LONGEST_PREFIX + 16 * RANGES_PER_COMMAND];
    uint8_t *at = payload + q->prefix_size;

    memcpy(payload, q->prefix, q->prefix_size);
    for (unsigned i = 0; i < q->count; i++, at += 16) {
        const uint64_t pair[2] = {
            __builtin_bswap64(q->start[i]), __builtin_bswap64(q->length[i])
        };
        memcpy(at, pair, sizeof(pair));
    }
    put_envelope(s, at - payload);
    put_bytes(s, payload, at - payload);
    q->count = 0;
}

/* The first bit at or behind `from` that is set in map ^ flip, or `end`. */
static size_t next_bit(const uint64_t *map, size_t from, size_t end, uint64_t flip)
{
    if (from >= end) {
        return end;
    }
    size_t index = from / 64;
    uint64_t word = (map[index] ^ flip) & (~UINT64_C(0) << (from % 64));

    while (word == 0) {
        if (++index * 64 >= end) {
            return end;
        }
        word = map[index] ^ flip;
    }
    const size_t bit = index * 64 + __builtin_ctzll(word);
    return bit < end ? bit : end;
}

size_t encode_discards(const uint64_t *map, size_t pages, unsigned page_shift,
                       const uint8_t *prefix, size_t prefix_size, int swapped,
                       uint8_t *buffer, size_t buffer_size)
{
    void (*ship)(struct stream *, struct queue *) = swapped ? ship_swapped : ship_bytewise;
    struct stream s = { .buffer = buffer, .size = buffer_size };
    struct queue q = { .prefix = prefix, .prefix_size = prefix_size };

    for (size_t end, start = next_bit(map, 0, pages, 0); start < pages;
         start = next_bit(map, end, pages, 0)) {
        end = next_bit(map, start, pages, ~UINT64_C(0));
        q.start[q.count] = (uint64_t)start << page_shift;
        q.length[q.count] = (uint64_t)(end - start) << page_shift;
        if (++q.count == RANGES_PER_COMMAND) {
            ship(&s, &q);
        }
    }
    if (q.count) {
        ship(&s, &q);
    }
    send_all(&s);
    return s.sent;
}
