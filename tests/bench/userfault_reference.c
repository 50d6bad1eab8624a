/* The C side of tests/bench/userfault.py: a page fault handler and a copy loop as plain C writes
 * them, and the guest whose faults both handlers serve.
 *
 *   cc -O2 -shared -fPIC   the library: place_copies, serve_faults
 *   cc -O2 -DGUEST         the guest program: SOCKET PAGES CPU SEED
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#include <linux/userfaultfd.h>

#define PAGE 4096UL

#ifndef GUEST

/* Places `total` bytes in pieces of `piece`; 0, or the errno of the ioctl that failed. */
int place_copies(int uffd, uint64_t to, uint64_t from, uint64_t total, uint64_t piece)
{
    for (uint64_t done = 0; done < total; done += piece) {
        struct uffdio_copy copy = {.dst = to + done, .src = from + done, .len = piece};
        if (ioctl(uffd, UFFDIO_COPY, &copy))
            return errno;
    }
    return 0;
}

/* Serves `count` faults: poll, read one message, copy one page; as QEMU's fault thread does. With
 * `read_on` it polls only when a read found nothing, as ours does. */
int serve_faults(int uffd, uint64_t base, uint64_t from, uint64_t count, int read_on)
{
    struct pollfd wait = {.fd = uffd, .events = POLLIN};
    for (uint64_t served = 0, waiting = 0; served < count;) {
        struct uffd_msg message;
        if (!waiting && poll(&wait, 1, -1) < 0)
            return errno;
        ssize_t size = read(uffd, &message, sizeof message);
        waiting = read_on && size > 0;
        if (size < 0 && errno == EAGAIN)
            continue;
        if (size != sizeof message || message.event != UFFD_EVENT_PAGEFAULT)
            return EIO;
        uint64_t page = message.arg.pagefault.address & ~(PAGE - 1);
        struct uffdio_copy copy = {.dst = page, .src = from + (page - base), .len = PAGE};
        if (ioctl(uffd, UFFDIO_COPY, &copy))
            return errno;
        served++;
    }
    return 0;
}

#else

static uint64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000UL + time.tv_nsec;
}

static void send_memory(int socket, int uffd, uint64_t address)
{
    char control[CMSG_SPACE(sizeof uffd)] = {0};
    struct iovec data = {&address, sizeof address};
    struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1,
                             .msg_control = control, .msg_controllen = sizeof control};
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof uffd);
    memcpy(CMSG_DATA(header), &uffd, sizeof uffd);
    if (sendmsg(socket, &message, 0) < 0)
        exit(1);
}

int main(int argc, char **argv)
{
    if (argc != 5)
        return 2;
    int socket = atoi(argv[1]);
    uint64_t pages = strtoull(argv[2], NULL, 10);
    cpu_set_t cpus;
    CPU_ZERO(&cpus);
    CPU_SET(atoi(argv[3]), &cpus);
    sched_setaffinity(0, sizeof cpus, &cpus);
    srandom(atoi(argv[4]));

    uint8_t *memory = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int uffd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    struct uffdio_api api = {.api = UFFD_API};
    struct uffdio_register reg = {.range = {(uint64_t)memory, pages * PAGE},
                                  .mode = UFFDIO_REGISTER_MODE_MISSING};
    if (memory == MAP_FAILED || uffd < 0 || ioctl(uffd, UFFDIO_API, &api) ||
        ioctl(uffd, UFFDIO_REGISTER, &reg))
        return 1;
    uint32_t *order = malloc(pages * sizeof *order);
    uint64_t *waits = calloc(pages, sizeof *waits);
    for (uint64_t i = 0; i < pages; i++)
        order[i] = i;
    for (uint64_t i = pages - 1; i > 0; i--) {
        uint64_t j = random() % (i + 1);
        uint32_t page = order[i];
        order[i] = order[j];
        order[j] = page;
    }
    char go;
    send_memory(socket, uffd, (uint64_t)memory);
    if (read(socket, &go, 1) != 1)
        return 1;
    volatile uint8_t seen = 0;
    for (uint64_t i = 0; i < pages; i++) {
        uint64_t before = now();
        seen += memory[order[i] * PAGE];
        waits[i] = now() - before;
    }
    return fwrite(waits, sizeof *waits, pages, stdout) != pages;
}

#endif
