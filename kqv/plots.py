def refresh_picture(out_dir, say):
    from report import refresh_picture as f

    return f(out_dir, say)
