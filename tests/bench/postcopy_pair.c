/* The postcopy phase as QEMU works it off, for comparison: no protocol but page records.
 *
 * Sender: for each page a record of 8 bytes of header and the page, 64 vectors to a writev.
 * Receiver: reads of 32 KiB, one page copied out of them at a time, one UFFDIO_COPY a page.
 *
 *     pair send HOST-ORDER-PORT BYTES        connects, sends random pages
 *     pair receive FD BYTES                  accepts on the inherited listening socket
 *
 * The receiver warms its memory when it has a connection, so that none of it is given back to the
 * host meanwhile, and prints the seconds from the first byte to the last page.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <endian.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096
#define VECTORS 64
#define CHUNK 32768

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static uint8_t *map(size_t bytes)
{
    uint8_t *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED)
        die("mmap");
    return p;
}

static int sender(int port, size_t bytes)
{
    uint8_t *ram = map(bytes);
    uint64_t x = 88172645463325252ull;
    for (size_t i = 0; i < bytes / 8; i++) {
        x ^= x << 13, x ^= x >> 7, x ^= x << 17;
        ((uint64_t *)ram)[i] = x;
    }
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int fd = socket(AF_INET, SOCK_STREAM, 0), on = 1;
    if (connect(fd, (struct sockaddr *)&address, sizeof address))
        die("connect");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    for (size_t offset = 0; offset < bytes;) {
        uint64_t head[VECTORS / 2];
        struct iovec vector[VECTORS];
        int n = 0;
        size_t size = 0;
        for (; n < VECTORS && offset < bytes; n += 2, offset += PAGE) {
            head[n / 2] = htobe64(offset | 0x28);
            vector[n] = (struct iovec){&head[n / 2], 8};
            vector[n + 1] = (struct iovec){ram + offset, PAGE};
            size += 8 + PAGE;
        }
        for (int i = 0; size;) {
            ssize_t sent = writev(fd, vector + i, n - i);
            if (sent < 0)
                die("writev");
            size -= sent;
            for (; i < n && (size_t)sent >= vector[i].iov_len; i++)
                sent -= vector[i].iov_len;
            if (i < n) {
                vector[i].iov_base = (uint8_t *)vector[i].iov_base + sent;
                vector[i].iov_len -= sent;
            }
        }
    }
    return 0;
}

struct stream {
    int fd;
    size_t at, end;
    uint8_t chunk[CHUNK];
};

static void take(struct stream *s, void *out, size_t size)
{
    while (size) {
        if (s->at == s->end) {
            ssize_t got = read(s->fd, s->chunk, CHUNK);
            if (got <= 0)
                die("read");
            s->at = 0;
            s->end = got;
        }
        size_t part = s->end - s->at < size ? s->end - s->at : size;
        memcpy(out, s->chunk + s->at, part);
        s->at += part;
        out = (uint8_t *)out + part;
        size -= part;
    }
}

static int receiver(int listening, size_t bytes)
{
    static struct stream s;
    s.fd = accept(listening, NULL, NULL);
    if (s.fd < 0)
        die("accept");
    uint8_t *ram = map(bytes), *page = map(PAGE);
    /* Warm: the pages that COPY will take are free, and were in use a moment ago. */
    if (madvise(ram, bytes, MADV_NOHUGEPAGE))
        die("madvise");
    memset(ram, 1, bytes);
    if (madvise(ram, bytes, MADV_DONTNEED))
        die("madvise");
    int uffd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    struct uffdio_api api = {.api = UFFD_API};
    struct uffdio_register range = {
        .range = {(uintptr_t)ram, bytes}, .mode = UFFDIO_REGISTER_MODE_MISSING};
    if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api) || ioctl(uffd, UFFDIO_REGISTER, &range))
        die("userfaultfd");
    double began = 0;
    for (size_t done = 0; done < bytes; done += PAGE) {
        uint64_t head;
        take(&s, &head, 8);
        if (!began)
            began = now();
        take(&s, page, PAGE);
        struct uffdio_copy copy = {
            .dst = (uintptr_t)ram + (be64toh(head) & ~0xfffull), .src = (uintptr_t)page, .len = PAGE};
        if (ioctl(uffd, UFFDIO_COPY, &copy))
            die("UFFDIO_COPY");
    }
    printf("%.6f\n", now() - began);
    return 0;
}

int main(int argc, char **argv)
{
    if (argc == 4 && !strcmp(argv[1], "send"))
        return sender(atoi(argv[2]), strtoull(argv[3], NULL, 0));
    if (argc == 4 && !strcmp(argv[1], "receive"))
        return receiver(atoi(argv[2]), strtoull(argv[3], NULL, 0));
    return 2;
}
