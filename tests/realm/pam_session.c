/*
 * A PAM module for tests of sessions. `ask`: it asks something, and there is no session without an answer. `hold=FILE`: it
 * keeps FILE open, and inherited by whatever is executed, for as long as the session lasts.
 *
 * No header is included, so that a compiler without development packages will do; the declarations are those of
 * pam_conv(3), pam_get_item(3) and open(2).
 */
typedef struct pam_handle pam_handle_t;
struct pam_message { int style; const char *text; };
struct pam_response { char *text; int retcode; };
struct pam_conv {
    int (*conv)(int, const struct pam_message **, struct pam_response **, void *);
    void *data;
};
extern int pam_get_item(const pam_handle_t *, int, const void **);
extern int open(const char *, int, ...);
extern int strncmp(const char *, const char *, unsigned long);

enum { SUCCESS = 0, SYSTEM_ERR = 4, SESSION_ERR = 14, ITEM_CONV = 5, ECHO_OFF = 1 };

static int ask(pam_handle_t *handle)
{
    const struct pam_message secret = {ECHO_OFF, "Secret: "};
    const struct pam_message *messages[1] = {&secret};
    const struct pam_conv *conv;
    struct pam_response *responses = 0;

    if (pam_get_item(handle, ITEM_CONV, (const void **)&conv) || !conv)
        return SYSTEM_ERR;
    return conv->conv(1, messages, &responses, conv->data) || !responses || !responses[0].text ? SESSION_ERR : SUCCESS;
}

int pam_sm_open_session(pam_handle_t *handle, int flags, int argc, const char **argv)
{
    (void)flags;
    for (int i = 0; i < argc; i++) {
        if (!strncmp(argv[i], "ask", 4) && ask(handle) != SUCCESS)
            return SESSION_ERR;
        if (!strncmp(argv[i], "hold=", 5) && open(argv[i] + 5, 0) < 0)
            return SYSTEM_ERR;
    }
    return SUCCESS;
}

int pam_sm_close_session(pam_handle_t *handle, int flags, int argc, const char **argv)
{
    (void)handle, (void)flags, (void)argc, (void)argv;
    return SUCCESS;
}
