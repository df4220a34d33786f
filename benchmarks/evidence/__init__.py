"""The experiment: when does VIG selection help?"""
