/* The floor under a call: two processes in C that send the same bytes back and forth over a Unix socket.
 *
 * Usage: hotpath_pingpong BYTES
 * Reads a number of round trips from standard input, as a line; answers with so many 64-bit nanoseconds on standard
 * output; ends with its input. The caller pins it to a core.
 */
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static void send_all(int fd, const char *bytes, size_t size) {
    while (size > 0) {
        ssize_t sent = send(fd, bytes, size, MSG_NOSIGNAL);
        if (sent <= 0) exit(1);
        bytes += sent;
        size -= (size_t)sent;
    }
}

static void receive_all(int fd, char *bytes, size_t size) {
    while (size > 0) {
        ssize_t received = recv(fd, bytes, size, 0);
        if (received <= 0) exit(0);
        bytes += received;
        size -= (size_t)received;
    }
}

static uint64_t now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

int main(int count, char **words) {
    size_t size = count == 2 ? strtoul(words[1], NULL, 10) : 0;
    int ends[2];
    char *bytes = calloc(size + 1, 1);
    if (size == 0 || bytes == NULL || socketpair(AF_UNIX, SOCK_STREAM, 0, ends) != 0) return 2;
    pid_t child = fork();
    if (child < 0) return 2;
    if (child == 0) {
        close(ends[0]);
        for (;;) {
            receive_all(ends[1], bytes, size);
            send_all(ends[1], bytes, size);
        }
    }
    close(ends[1]);
    char line[32];
    while (fgets(line, sizeof line, stdin) != NULL) {
        size_t rounds = strtoul(line, NULL, 10);
        uint64_t *taken = calloc(rounds + 1, sizeof *taken);
        if (taken == NULL) return 2;
        for (size_t round = 0; round < rounds; round++) {
            uint64_t start = now();
            send_all(ends[0], bytes, size);
            receive_all(ends[0], bytes, size);
            taken[round] = now() - start;
        }
        if (fwrite(taken, sizeof *taken, rounds, stdout) != rounds || fflush(stdout) != 0) return 1;
        free(taken);
    }
    return 0;
}
