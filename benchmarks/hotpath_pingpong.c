/* The lower bound of a call: two C programs that send the same bytes back and forth over a Unix socket.
 *
 * Usage: hotpath_pingpong serve PATH BYTES | hotpath_pingpong call PATH BYTES
 * `serve` prints {"ready": true} and echoes one connection after another. `call` reads lines `one ROUNDS` from standard
 * input and answers each with {"values": [microseconds of each round trip]}.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

static int send_all(int fd, const char *bytes, size_t size) {
    while (size > 0) {
        ssize_t sent = send(fd, bytes, size, MSG_NOSIGNAL);
        if (sent <= 0) return 0;
        bytes += sent;
        size -= (size_t)sent;
    }
    return 1;
}

static int receive_all(int fd, char *bytes, size_t size) {
    while (size > 0) {
        ssize_t received = recv(fd, bytes, size, 0);
        if (received <= 0) return 0;
        bytes += received;
        size -= (size_t)received;
    }
    return 1;
}

static double now_us(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec * 1e6 + (double)time.tv_nsec / 1e3;
}

static int ready(void) {
    return puts("{\"ready\": true}") >= 0 && fflush(stdout) == 0;
}

static int serve(const struct sockaddr_un *address, char *bytes, size_t size) {
    int listener = socket(AF_UNIX, SOCK_STREAM, 0);
    if (bind(listener, (const struct sockaddr *)address, sizeof *address) != 0 || listen(listener, 8) != 0) return 2;
    if (!ready()) return 1;
    for (;;) {
        int fd = accept(listener, NULL, NULL);
        if (fd < 0) return 1;
        while (receive_all(fd, bytes, size) && send_all(fd, bytes, size)) {}
        close(fd);
    }
}

static int call(const struct sockaddr_un *address, char *bytes, size_t size) {
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    char line[64];
    unsigned long rounds;
    if (connect(fd, (const struct sockaddr *)address, sizeof *address) != 0 || !ready()) return 2;
    while (fgets(line, sizeof line, stdin) != NULL) {
        if (sscanf(line, "one %lu", &rounds) != 1) return 2;
        double *taken = calloc(rounds + 1, sizeof *taken);
        if (taken == NULL) return 2;
        for (unsigned long round = 0; round < rounds; round++) {
            double start = now_us();
            if (!send_all(fd, bytes, size) || !receive_all(fd, bytes, size)) return 1;
            taken[round] = now_us() - start;
        }
        printf("{\"values\": [");
        for (unsigned long round = 0; round < rounds; round++) printf(round ? ", %.3f" : "%.3f", taken[round]);
        printf("]}\n");
        fflush(stdout);
        free(taken);
    }
    return 0;
}

int main(int count, char **words) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    size_t size = count == 4 ? strtoul(words[3], NULL, 10) : 0;
    char *bytes = calloc(size + 1, 1);
    if (size == 0 || bytes == NULL || strlen(words[2]) >= sizeof address.sun_path) return 2;
    strcpy(address.sun_path, words[2]);
    return strcmp(words[1], "serve") == 0 ? serve(&address, bytes, size) : call(&address, bytes, size);
}
